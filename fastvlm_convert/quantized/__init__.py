"""Quantized weights as data: schemes, packing, storage, plans and reports of layers."""
