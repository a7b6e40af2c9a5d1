"""A whole ServerApp/ClientApp pair on one machine, over an executor: Flower's Grid without Ray."""
