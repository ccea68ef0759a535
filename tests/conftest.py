pytest_plugins = ["tp_attention.launch.testing"]
