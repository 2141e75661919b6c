"""The compiled data plane: blocks in, compressed and folded objects in an arena, blocks out."""
