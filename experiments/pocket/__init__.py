"""The pocket models: a tiny actor and a tiny reflector that let the real system run on two CPU
cores without a download.

They are stand-ins that show the machinery at work, never evidence about language models.
"""
