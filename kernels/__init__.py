"""Operations: a plain-PyTorch reference and a fast version each, behind one dispatcher. Imports torch only."""
