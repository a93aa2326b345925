"""Attention on narrow factors: one fused kernel per kind of device."""
