//! The keys of anchors and issuers, one object per key, created once.
