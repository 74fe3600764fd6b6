//! What open connections promise: a bundle says of a connection what it would say of a handshake.

#![allow(clippy::unwrap_used, reason = "in a test what cannot be had is a failure")]

mod support;

use rustls_pki_types::CertificateDer;
use steadfast_api::{Code, KeyId};
use steadfast_identity_client::verify::{Role, check_chain};
use steadfast_identity_client::{End, Footing, Standing, SvidKey, Trust};
use support::*;

fn chain(issuer: &Authority) -> Vec<CertificateDer<'static>> {
    let key = SvidKey::generate().unwrap();
    issuer.sign(&Leaf::of(&name("web")), &key).into_iter().map(CertificateDer::from).collect()
}

fn subsets<T: Copy>(of: &[T]) -> Vec<Vec<T>> {
    let chosen = |mask: usize| {
        let indexed = of.iter().enumerate();
        indexed.filter(|(at, _)| mask & (1 << at) != 0).map(|(_, item)| *item).collect()
    };
    (0..1 << of.len()).map(chosen).collect()
}

#[test]
fn a_bundle_says_of_an_open_connection_what_it_would_say_of_a_new_handshake() {
    let anchors = [Authority::anchor("a"), Authority::anchor("b")];
    // Each SVID under an anchor, and one that is an issuer deeper.
    let upper = anchors.each_ref().map(|anchor| anchor.issuer("upper"));
    let lower = upper.each_ref().map(|upper| upper.issuer("lower"));
    let issuers: Vec<&Authority> = upper.iter().chain(&lower).collect();
    let all: Vec<&Authority> = anchors.iter().collect();
    let ids: Vec<KeyId> = issuers.iter().map(|issuer| issuer.id()).collect();
    let before = trust(&all);
    let judged = |chain: &[CertificateDer<'static>], trust: &Trust| {
        check_chain(Role::Client, &chain[0], &chain[1..], trust, NOW, None)
    };
    for issuer in &issuers {
        let chain = chain(issuer);
        let peer = judged(&chain, &before).unwrap();
        for (published, denied) in subsets(&all)
            .into_iter()
            .filter(|published| !published.is_empty())
            .flat_map(|published| subsets(&ids).into_iter().map(move |d| (published.clone(), d)))
        {
            let now = trust_denying(&published, &denied);
            let fresh = judged(&chain, &now).map_err(|refused| refused.code);
            for end in [End::Own, End::Peer] {
                let footing = match end {
                    End::Own => Footing::between(Some(peer.clone()), None),
                    End::Peer => Footing::between(None, Some(peer.clone())),
                };
                let standing = footing.standing(&now);
                assert_eq!(standing == Standing::Good, fresh.is_ok(), "{standing:?} {fresh:?}");
                let denies = peer.issuers.iter().any(|issuer| denied.contains(issuer));
                assert_eq!(matches!(standing, Standing::Denied(..)), denies, "{standing:?}");
            }
        }
    }
}

#[test]
fn the_worst_that_is_said_of_either_end_counts_and_has_a_code_of_its_own() {
    let (ours, theirs) = (Authority::anchor("ours"), Authority::anchor("theirs"));
    let (our_issuer, their_issuer) = (ours.issuer("ours"), theirs.issuer("theirs"));
    let both = trust(&[&ours, &theirs]);
    let verified = |issuer: &Authority| {
        let chain = chain(issuer);
        check_chain(Role::Client, &chain[0], &chain[1..], &both, NOW, None).unwrap()
    };
    let footing = Footing::between(Some(verified(&our_issuer)), Some(verified(&their_issuer)));
    let code = |anchors: &[&Authority], denied: &[KeyId]| {
        footing.standing(&trust_denying(anchors, denied)).code()
    };
    assert_eq!(code(&[&ours, &theirs], &[]), None);
    assert_eq!(code(&[&ours], &[]), Some(Code::PEER_ANCHOR_WITHDRAWN));
    assert_eq!(code(&[&theirs], &[]), Some(Code::SVID_ANCHOR_WITHDRAWN));
    assert_eq!(code(&[&ours], &[our_issuer.id()]), Some(Code::SVID_ISSUER_DENIED));
    assert_eq!(code(&[&theirs], &[their_issuer.id()]), Some(Code::PEER_ISSUER_DENIED));
    assert_eq!(Footing::default().standing(&both), Standing::Good);
}
