from plain_unpack import fast_unpack as fast_unpack
