"""The built-in models: plain modules, which need torch alone and know nothing of meta-learning."""
