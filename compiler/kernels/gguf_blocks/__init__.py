"""Numbers to the blocks of codes of GGUF files, with the bytes that llama.cpp writes."""
