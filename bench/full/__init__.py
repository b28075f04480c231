"""A checkpoint of full size in both layouts: the command, and one side in a process of its own."""
