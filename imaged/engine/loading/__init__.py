"""From files to nets on a device: load chooses diffusers_folder or single_file; lora."""
