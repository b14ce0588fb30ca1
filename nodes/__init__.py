"""ComfyUI nodes: sockets to tensors and back, progress, interrupt. The mathematics is icmsr_core's."""
