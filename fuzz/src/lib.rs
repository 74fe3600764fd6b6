//! A fuzz target for every parser of what others write, as plain functions.
//!
//! A target takes any bytes, panics where a promise is broken (beyond "never panics": what parses
//! prints back, what is fed in pieces means the same), and says whether it accepted them. Its
//! seeds are made here, so that no binary is committed; at least one must be accepted, or the
//! target would only ever test refusals. Executables for libFuzzer are behind the feature
//! `fuzzing`; plain test runs put mutated seeds through every target.

#![forbid(unsafe_code)]

mod certificates;
mod http1;
mod identity;
mod injection;
mod resources;
mod text;
mod token;
mod wire;

/// One target.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, which is its executable's too.
    pub name: &'static str,
    /// Takes any bytes; whether they were accepted.
    pub run: fn(&[u8]) -> bool,
    /// What a fuzzer starts from.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// Runs one target by its name.
///
/// # Panics
/// When a promise is broken, or no target has the name.
pub fn run(name: &str, input: &[u8]) -> bool {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.expect("every executable has a target").run)(input)
}

/// Every target, in the order of names.
pub const TARGETS: &[Target] = &[
    Target { name: "bundle", run: identity::bundle, seeds: identity::bundle_seeds },
    Target { name: "chain", run: identity::chain, seeds: identity::chain_seeds },
    Target { name: "client_hello", run: wire::client_hello, seeds: wire::client_hello_seeds },
    Target { name: "csr", run: identity::csr, seeds: identity::csr_seeds },
    Target { name: "http1_chunks", run: http1::chunks, seeds: http1::chunks_seeds },
    Target { name: "http1_head", run: http1::head, seeds: http1::head_seeds },
    Target { name: "http1_server", run: http1::server, seeds: http1::server_seeds },
    Target { name: "http_sniff", run: wire::sniff, seeds: wire::sniff_seeds },
    Target { name: "import", run: identity::import, seeds: identity::import_seeds },
    Target { name: "injection", run: injection::injection, seeds: injection::injection_seeds },
    Target {
        name: "issuer_secret",
        run: resources::issuer_secret,
        seeds: resources::issuer_secret_seeds,
    },
    Target { name: "manifest", run: text::manifest, seeds: text::manifest_seeds },
    Target { name: "policy", run: text::policy, seeds: text::policy_seeds },
    Target { name: "resources", run: resources::resources, seeds: resources::resources_seeds },
    Target { name: "spiffe_id", run: text::spiffe_id, seeds: text::spiffe_id_seeds },
    Target { name: "svid", run: identity::svid, seeds: identity::svid_seeds },
    Target { name: "token", run: token::token, seeds: token::token_seeds },
    Target {
        name: "transport_header",
        run: wire::transport_header,
        seeds: wire::transport_header_seeds,
    },
    Target {
        name: "trust_messages",
        run: identity::trust_messages,
        seeds: identity::trust_messages_seeds,
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_accepts_a_seed() {
        for target in TARGETS {
            let seeds = (target.seeds)();
            assert!(seeds.iter().any(|seed| (target.run)(seed)), "{}", target.name);
        }
    }

    #[test]
    fn every_target_has_an_executable_and_no_executable_lacks_one() {
        let manifest = include_str!("../Cargo.toml");
        let names: Vec<_> = manifest
            .split("[[bin]]\nname = \"")
            .skip(1)
            .map(|rest| rest.split('"').next().unwrap())
            .collect();
        assert_eq!(names, TARGETS.iter().map(|target| target.name).collect::<Vec<_>>());
    }

    /// A poor man's fuzzer, so that a plain test run already meets broken bytes.
    #[test]
    fn mutated_seeds_break_no_promise() {
        for target in TARGETS {
            let mut random = 1_u64;
            for seed in (target.seeds)() {
                (target.run)(&[]);
                let cuts = seed.len().div_ceil(CUTS_PER_SEED).max(1);
                for end in (0..seed.len()).step_by(cuts) {
                    (target.run)(&seed[..end]);
                }
                for _ in 0..MUTATIONS_PER_SEED {
                    let input = mutated(&seed, &mut random);
                    let outcome = std::panic::catch_unwind(|| (target.run)(&input));
                    let shown = input.escape_ascii();
                    assert!(outcome.is_ok(), "{} breaks a promise on b\"{shown}\"", target.name);
                }
            }
        }
    }

    /// A few bytes replaced, removed or repeated; SplitMix64 decides which.
    fn mutated(seed: &[u8], random: &mut u64) -> Vec<u8> {
        let mut draw = |below: usize| {
            *random = random.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mixed = (*random ^ (*random >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            (mixed >> 33) as usize % below.max(1)
        };
        let mut bytes = seed.to_vec();
        for _ in 0..1 + draw(3) {
            let at = draw(bytes.len());
            match draw(4) {
                _ if bytes.is_empty() => bytes.push(draw(256) as u8),
                0 => drop(bytes.remove(at)),
                1 => bytes.insert(at, draw(256) as u8),
                2 => bytes[at] ^= 1 << draw(8),
                _ => {
                    let piece = bytes[at..(at + draw(32)).min(bytes.len())].to_vec();
                    let to = draw(bytes.len());
                    bytes.splice(to..to, piece);
                }
            }
        }
        bytes
    }

    const CUTS_PER_SEED: usize = 100;
    const MUTATIONS_PER_SEED: usize = 200;
}
