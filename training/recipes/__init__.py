"""What a training command decides for images that somebody brings: inputs to make, network sizes and lengths.

`collection` finds out what there is, `settings` chooses what is not given, `folders` says where everything lies,
`completion` writes both into the config of a command, and `estimate` says how long it takes.
"""
