"""What a checkpoint's files tell without tensors: headers and digests (weight_files), configuration
and tokenizers (metadata), how its prompts and schedulers would be read (explain).
"""
