"""Attention on Qhat and Khat: the definition, and one fused kernel per kind of device."""
