"""x @ dequantize(codes, scale).T without expanding the weight in memory."""
