"""The kernel of notebooks that the driver runs: the server of their workers starts with it.

Both import the library, several seconds each: at the same time, on a core each, instead of one
after the other.
"""

from allo_lib.machine import runtime

if __name__ == "__main__":  # workers load this module, too, and need no kernel
    from ipykernel import kernelapp

    runtime.start_early()
    kernelapp.launch_new_instance()
