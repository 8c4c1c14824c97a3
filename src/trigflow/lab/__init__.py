"""Around training: recipes of known runs, plans of what they cost, a doctor for runs, and the demo."""
