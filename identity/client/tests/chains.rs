//! What checking a chain promises for every input: no bytes panic, no altered chain gets through,
//! and what was remembered never changes an answer.

#![allow(clippy::unwrap_used, reason = "in a test what cannot be had is a failure")]

mod support;

use std::sync::LazyLock;
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use rustls_pki_types::CertificateDer;
use steadfast_api::{Code, SpiffeId, UnixTime};
use steadfast_identity_client::verify::{Role, check_chain};
use steadfast_identity_client::{SvidKey, Trust};
use support::*;

/// Made once: keys are slow.
struct World {
    anchor: Authority,
    issuer: Authority,
    chain: Vec<Vec<u8>>,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let anchor = Authority::anchor("anchor");
    let issuer = anchor.issuer("issuer");
    let key = SvidKey::generate().unwrap();
    let chain = issuer.sign(&Leaf::of(&name("web")), &key);
    World { anchor, issuer, chain }
});

/// The id, or the code.
fn check(
    chain: &[Vec<u8>],
    trust: &Trust,
    now: UnixTime,
    expected: Option<&SpiffeId>,
) -> Result<SpiffeId, Code> {
    let chain: Vec<_> = chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
    let (leaf, issuers) = chain.split_first().unwrap();
    let checks = [Role::Client, Role::Server].map(|role| {
        check_chain(role, leaf, issuers, trust, now, expected)
            .map(|peer| peer.id.clone())
            .map_err(|refused| refused.code)
    });
    // The reasons may differ: an altered byte can cost one role alone its key usage.
    assert_eq!(checks[0].is_ok(), checks[1].is_ok(), "an SVID serves in both roles");
    let [client, _] = checks;
    client
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    #[test]
    fn no_bytes_panic_and_none_are_accepted(
        leaf in vec(any::<u8>(), 0..600),
        issuers in vec(vec(any::<u8>(), 0..600), 0..10),
    ) {
        let chain = [vec![leaf], issuers].concat();
        let refused = check(&chain, &trust(&[&WORLD.anchor]), NOW, None);
        prop_assert_eq!(refused, Err(Code::PEER_MALFORMED));
    }

    #[test]
    fn a_chain_with_one_altered_byte_is_refused(at in any::<prop::sample::Index>(), bits in 1..=255_u8) {
        let mut chain = WORLD.chain.clone();
        let at = at.index(chain.iter().map(Vec::len).sum());
        let leaf_bytes = chain[0].len();
        if at < leaf_bytes { chain[0][at] ^= bits } else { chain[1][at - leaf_bytes] ^= bits }
        prop_assert!(check(&chain, &trust(&[&WORLD.anchor]), NOW, None).is_err());
    }

    #[test]
    fn what_is_remembered_changes_no_answer(
        times in vec((-7200_i64..7200, any::<bool>()), 1..20),
    ) {
        let remembering = trust(&[&WORLD.anchor]);
        for (offset, right) in times {
            let now = UnixTime::from_secs(NOW.as_secs() as i64 + offset);
            let expected = if right { id("web") } else { id("other") };
            let fresh = check(&WORLD.chain, &trust(&[&WORLD.anchor]), now, Some(&expected));
            prop_assert_eq!(check(&WORLD.chain, &remembering, now, Some(&expected)), fresh);
        }
    }
}

#[test]
fn the_good_chain_is_good_from_its_first_to_its_last_second() {
    let trust = trust(&[&WORLD.anchor]);
    let first = NOW - Duration::from_secs(300);
    let last = NOW + HOUR;
    for (now, answer) in [
        (first - Duration::from_secs(1), Err(Code::PEER_NOT_YET_VALID)),
        (first, Ok(id("web"))),
        (last + Duration::from_millis(999), Ok(id("web"))),
        (last + Duration::from_secs(1), Err(Code::PEER_EXPIRED)),
    ] {
        assert_eq!(check(&WORLD.chain, &trust, now, None), answer, "{now}");
    }
}

#[test]
fn an_svid_without_its_issuer_is_of_an_unknown_one() {
    let alone = &WORLD.chain[..1];
    assert_eq!(check(alone, &trust(&[&WORLD.anchor]), NOW, None), Err(Code::PEER_UNKNOWN_ISSUER));
}

#[test]
fn an_issuer_that_has_expired_carries_no_svid() {
    let issuer = WORLD.anchor.issuer_valid("short issuer", NOW - HOUR, NOW - HOUR / 2);
    let chain = issuer.sign(&Leaf::of(&name("web")), &SvidKey::generate().unwrap());
    let refused = check(&chain, &trust(&[&WORLD.anchor]), NOW, None);
    assert_eq!(refused, Err(Code::PEER_EXPIRED));
}

#[test]
fn an_svid_signed_by_an_svid_is_no_svid() {
    let key = SvidKey::generate().unwrap();
    let chain = WORLD.issuer.sign(&Leaf::of(&name("web")), &key);
    let forger = Authority::of_svid(key, chain);
    let forged = forger.sign(&Leaf::of(&name("admin")), &SvidKey::generate().unwrap());
    let refused = check(&forged, &trust(&[&WORLD.anchor]), NOW, None);
    assert_eq!(refused, Err(Code::PEER_NOT_SVID));
}

#[test]
fn a_tombstoned_anchor_leaves_a_bundle_that_would_bring_it_back() {
    let other = Authority::anchor("other");
    let both = bundle(1, &[&WORLD.anchor, &other]);
    let trust = Trust::new(&both, [], [WORLD.anchor.id()]).unwrap();
    assert_eq!(check(&WORLD.chain, &trust, NOW, None), Err(Code::PEER_UNKNOWN_ISSUER));
    let nobody = Trust::new(&bundle(1, &[&WORLD.anchor]), [], [WORLD.anchor.id()]);
    assert!(nobody.is_err(), "no bundle is ever empty");
}

#[test]
fn a_chain_too_long_to_be_one_is_not_read() {
    let long = vec![WORLD.chain[0].clone(); 9];
    assert_eq!(check(&long, &trust(&[&WORLD.anchor]), NOW, None), Err(Code::PEER_MALFORMED));
}

#[test]
fn more_peers_than_are_remembered_are_told_apart() {
    let trust = trust(&[&WORLD.anchor]);
    let key = SvidKey::generate().unwrap();
    let peers: Vec<_> = (0..300)
        .map(|n| {
            let name = name(&format!("peer-{n}"));
            (WORLD.issuer.sign(&Leaf::of(&name), &key), name.spiffe_id())
        })
        .collect();
    for _ in 0..2 {
        for (chain, id) in &peers {
            assert_eq!(check(chain, &trust, NOW, None).as_ref(), Ok(id));
        }
    }
}
