def read_single_file(path):
    raise NotImplementedError
