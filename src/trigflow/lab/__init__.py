"""Around training: recipes of known runs, plans of what they cost, studies of what holds, a doctor for runs, and the demo."""
