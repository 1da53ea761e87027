"""The MLPs that a block can have, under TransformerLens' module names."""
