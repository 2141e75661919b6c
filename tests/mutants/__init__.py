"""Mistakes such as a hurried engineer makes, kept as files, and the program that tries them: does a test find each?"""
