"""The bugs of the zoo. Each module has those of one area; ``layer`` collects those of a layer's stages."""
