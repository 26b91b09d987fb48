"""The command lines, one module each: what flags there are, and which function they call.

Nothing here imports JAX or transformers before the flags are read and right: --help and refusals
take a moment, not the seconds of an accelerator stack.
"""
