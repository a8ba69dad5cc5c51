"""Sample adapters: the tasks they were trained for, their training and their evaluation.

Importing this package imports nothing else: the server reads the adapter folders
beside this file and needs neither the training code nor its dependencies.
"""
