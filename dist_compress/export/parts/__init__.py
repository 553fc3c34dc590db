"""What several formats share: a call and its outputs, the gates of agreement, programs of torch.export, ONNX."""
