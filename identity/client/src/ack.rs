//! What a workload says about itself on the trust stream.

use std::collections::BTreeSet;

use aws_lc_rs::digest::{SHA256, digest};
use steadfast_api::KeyId;
use steadfast_api::trust::v1::stream_request::Message;
use steadfast_api::trust::v1::{Ack, AnchorUse, Held, Instance, IssuerUse, StreamRequest};
use steadfast_rotation_protocol::Jitter;

use crate::context::TlsContext;
use crate::observed::{Counted, Issuers, Observed};
use crate::trust::Trust;

/// The ack of what this snapshot uses, in both its client and its server side.
pub(crate) fn of(
    context: &TlsContext,
    nonce: u64,
    instance: &Instance,
    mounted_digest: Vec<u8>,
    observed: &Observed,
    counted: &Counted,
    differs: bool,
) -> StreamRequest {
    let (bundle, svid) = (context.bundle.as_ref(), context.svid.as_ref());
    let uses = counted
        .handshakes
        .iter()
        .map(|(anchor, &count)| AnchorUse { anchor_id: anchor.as_bytes().to_vec(), count });
    let ack = Ack {
        instance: Some(instance.clone()),
        nonce,
        seq: bundle.map_or(0, |bundle| bundle.sequence()),
        digest: bundle.map_or_else(Vec::new, |bundle| bundle.digest().to_vec()),
        mounted_digest,
        svid_issuer: svid.map_or_else(Vec::new, |svid| svid.issuer().as_bytes().to_vec()),
        svid_not_after: svid.map(|svid| svid.facts().not_after.into()),
        clock_offset: observed.clock_offset_ms().map(signed_millis),
        handshakes: uses.collect(),
        issuers: by_issuer(&counted.issuers),
        held: bundle.filter(|_| differs).map(|bundle| held(bundle)),
    };
    StreamRequest { message: Some(Message::Ack(ack)) }
}

fn by_issuer(issuers: &Issuers) -> Vec<IssuerUse> {
    let named: BTreeSet<_> = issuers.accepted.keys().chain(issuers.failed.keys()).collect();
    let uses = named.into_iter().map(|issuer| {
        let accepted = issuers.accepted.get(issuer).copied().unwrap_or_default();
        let (failed, code) =
            issuers.failed.get(issuer).map_or((0, ""), |(failed, code)| (*failed, code.label()));
        IssuerUse {
            issuer_id: issuer.as_bytes().to_vec(),
            inbound: accepted.inbound,
            outbound: accepted.outbound,
            failed,
            failure: code.to_owned(),
            failed_at: None,
        }
    });
    uses.collect()
}

/// What is used, for who has never published it.
pub fn held(bundle: &Trust) -> Held {
    let bytes = |id: KeyId| id.as_bytes().to_vec();
    Held {
        anchors: bundle.anchors().iter().map(|anchor| bytes(anchor.id())).collect(),
        tombstones: bundle.tombstones().iter().copied().map(bytes).collect(),
        denied_issuers: bundle.denied().iter().copied().map(bytes).collect(),
    }
}

/// This instance's place in a window: always the same, however often it is asked for.
pub fn share(instance: &Instance) -> Jitter {
    let mut bytes = instance.pod_uid.clone().into_bytes();
    if let Some(started_at) = &instance.started_at {
        bytes.extend(started_at.seconds.to_be_bytes());
        bytes.extend(started_at.nanos.to_be_bytes());
    }
    let hash = digest(&SHA256, &bytes);
    let first = hash.as_ref().first_chunk().copied().unwrap_or_default();
    Jitter::from_bits(u32::from_be_bytes(first))
}

/// protobuf: seconds and nanoseconds have the same sign.
fn signed_millis(millis: i64) -> prost_types::Duration {
    prost_types::Duration { seconds: millis / 1000, nanos: (millis % 1000) as i32 * 1_000_000 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_negative_offset_keeps_its_sign_in_both_parts() {
        let offset = signed_millis(-1_250);
        assert_eq!((offset.seconds, offset.nanos), (-1, -250_000_000));
    }

    #[test]
    fn instances_spread_over_a_window_and_stay_where_they_are() {
        let at = |uid: u32| {
            let instance = Instance { pod_uid: uid.to_string(), started_at: None };
            share(&instance).of(std::time::Duration::from_secs(100)).as_secs()
        };
        assert_eq!(at(1), at(1));
        let places: BTreeSet<u64> = (0..100).map(at).collect();
        assert!(places.len() > 40, "{places:?}");
    }
}
