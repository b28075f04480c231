"""What a checkpoint's files tell without loading tensors: configuration and tokenizers (metadata),
and how its prompts and schedulers are read (explain).
"""
