"""C++ for what an encoder computes on edges on a processor, compiled at first use for the processor at hand."""
