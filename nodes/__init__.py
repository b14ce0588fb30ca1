"""The ComfyUI nodes: inputs and outputs, progress and interrupts. The computing is done by icmsr_core."""
