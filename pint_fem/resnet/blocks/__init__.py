"""Networks whose layers are any modules of torch with an output of their input's shape."""
