"""Open Inference Protocol v2 (KServe, Triton) over JSON, binary tensors and protobuf: pure functions, no network."""
