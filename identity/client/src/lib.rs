//! How a process of ours gets, renews and uses its SVID: verifiers, TLS context, trust stream
