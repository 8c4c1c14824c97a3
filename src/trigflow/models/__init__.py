"""A network with everything that drawing from it needs: the model, its folder, and models that others have trained."""
