"""How work is run: in processes, within memory, resumable. Nothing here knows of networks."""
