"""Every architecture × every kind of adapter, served as rows of one batch and held against PEFT alone."""
