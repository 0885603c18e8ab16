def status(): return "stub"
def available(): return False
def can_quantize(*a): return False
def can_dequantize(*a): return False
def can_project(*a): return False
