"""The torch reference: FastVLM as the paper has it, equal to the original implementation."""
