"""What the keys of a run's dictionary are called where people read them."""

ROW_NAMES = {
    "fp_full": "full precision (fp32)",
    "fp_half": "full precision (fp32), half the steps",
    "ptq_full": "quantized, fixed-bit calibration",
    "pq_full": "quantized, progressive",
    "ptq_half": "quantized, fixed-bit calibration, half the steps",
    "pq_half": "quantized, progressive, half the steps",
    "pqcad_half": "quantized, distilled to half the steps",
    "shipped_half": "what the default recipe made before, half the steps",
}
BYTE_NAMES = {
    "fp32_checkpoint": "checkpoint, fp32 (safetensors)",
    "checkpoint": "checkpoint, compressed (safetensors)",
    "fp32_pte": "unet.pte, fp32",
    "pte": "unet.pte, compressed",
    "resident_weights": "weights in memory, compressed",
}
LATENCY_NAMES = {
    "fp32_eager": "PyTorch eager, fp32",
    "fp32_compile": "torch.compile, fp32",
    "compressed_compile": "torch.compile, compressed",
    "pte_fp32": "ExecuTorch, fp32",
    "pte": "ExecuTorch, compressed",
}
SQNR_NAMES = {
    "ptq_step": "one step: fixed-bit against full precision, over trajectories",
    "pq_step": "one step: progressive against full precision, over trajectories",
    "pte_vs_eager": "one step: unet.pte against the eager compressed model, worst of the checked timesteps",
    "pte_images": "finished pictures: unet.pte against the eager compressed model",
}
