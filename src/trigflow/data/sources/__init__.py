"""Where data come from, one file a kind of place: folders, zips, tars, tables of the Hugging Face hub, embedded sets."""
