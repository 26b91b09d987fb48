"""What the pocket models hold, as hashes, so that results show by whom they were played wherever
they are read. Those of earlier versions stay when new ones are trained.
"""

CONTENT_HASHES = frozenset(
    {
        # actor and reflector for MiniHack
        "1308925eb627a9578e5df72da693f23506c234148428436e1454152b295a79a3",
        "5c11ca5b1934c1e877af835d7660882be977a4973dd391e6cd3c5c551f26d1f4",
        # for MiniHack and ALFWorld
        "ecc54d33cc48a70f1cf4b0a886eff260c662df87ad4ac2761907accf7dd608e2",
        "c5585b361d8b37af7a54a723e4d2e4c4ed33a9706aa65b483da8817cbad8e3f0",
        # of the preset fake-tiny
        "d55b2b2fd61c0c190f9bcb5d103aa6cbb7f1ae8bb288bfbe2bdb47aa10e16136",
        "65ac778c08ce7abf1099df1479b8115cad55a8c1f16af63a780bd2df00a1bd3d",
    }
)
"""Of every folder, `ictjax.models.hf.content_hash`: settings.json of an evaluation has them."""
