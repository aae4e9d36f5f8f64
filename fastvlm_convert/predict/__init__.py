"""What an export will do and cost, from config and headers alone: its plan, sizes, memory and support."""
