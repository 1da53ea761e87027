"""Does lensbridge give the numbers of TransformerLens 3.9.0 and of HuggingFace? Every test here is a comparison."""
