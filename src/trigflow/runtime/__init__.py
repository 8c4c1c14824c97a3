"""What knows of the operating system: files, processes, signals, memory, and the errors that a user can act on.

Nothing here knows of diffusion, and nothing here imports another room of the package.
"""
