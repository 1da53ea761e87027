"""What does a config ask for?

TransformerLens' three factories: an activation function and an MLP for a model of one's own, and for a HuggingFace
model what describes its family. For the last TransformerLens 3.9.0 has adapters, which build its other model class from
the HuggingFace one; here a family is described by a record (`lensbridge.architectures`), so that is what the factory
finds and takes.
"""
