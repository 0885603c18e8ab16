def can_quantize(*a): return False
def can_dequantize(*a): return False
