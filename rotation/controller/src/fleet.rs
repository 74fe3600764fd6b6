//! The replicas of identity, over the network: the query to each, and what each knows.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use futures::future::join_all;
use steadfast_api::trust::v1::report_part::Part;
use steadfast_api::trust::v1::{self, QueryRequest, ReportHead, ReportRequest};
use steadfast_api::{KeyId, UnixTime};
use steadfast_api_grpc::fleet_client::FleetClient;
use steadfast_identity_client::Replicas;
use steadfast_rotation_protocol::Instance;
use steadfast_rotation_protocol::census::{
    Ack, Failed, Held, HeldSvid, IssuerUse, Member, Replica,
};
use tonic::transport::Channel;

use crate::shell::Fleet;

/// Reaches every replica that the name of the identity service stands for.
pub struct Network {
    replicas: Replicas,
    /// The name of the service, for when it stands for nobody.
    service: String,
    /// By address: a name service tells them in another order each time.
    connected: tokio::sync::Mutex<BTreeMap<SocketAddr, Connected>>,
}

/// A replica, as far as it was reached.
#[derive(Default)]
struct Connected {
    client: Option<FleetClient<Channel>>,
    /// How many members it told of last.
    members: u32,
    /// What was told of it last, so that what lasts is told once.
    told: Option<String>,
}

/// Why a replica told nothing.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error("it cannot be reached: {0}")]
    Dial(#[from] steadfast_identity_client::DialError),
    #[error("its report has no head")]
    NoHead,
    #[error("it refused: {}", .0.message())]
    Rpc(Box<tonic::Status>),
    #[error("no answer within {} s", ASK_TIMEOUT.as_secs())]
    Silent,
    #[error("we have no token: {0}")]
    Token(String),
}

impl Network {
    /// Nobody is connected yet.
    pub fn new(replicas: Replicas, service: String) -> Self {
        Self { replicas, service, connected: tokio::sync::Mutex::default() }
    }

    /// Asks one replica, and waits until its members have answered or a moment has passed.
    async fn ask_one(&self, at: SocketAddr, connected: &mut Connected, nonce: u64) -> Replica {
        // No other has this address.
        let name = format!("identity {at}");
        let Connected { client, members, told } = connected;
        // Most of them have answered by then: a report for nothing is work.
        let answers = ANSWER.saturating_mul(*members).min(ANSWERS_MAX);
        let asked = async {
            // That identity has closed a connection shows only when it is used: whoever has been
            // idle for long enough would take a replica that is well for one that is away.
            if client.is_some()
                && let Ok(replica) = self.try_ask(at, client, nonce, &name, answers).await
            {
                return Ok(replica);
            }
            *client = None;
            self.try_ask(at, client, nonce, &name, answers).await
        };
        match tokio::time::timeout(ASK_TIMEOUT, asked).await.unwrap_or(Err(AskError::Silent)) {
            Ok(replica) => {
                *members = u32::try_from(replica.members.len()).unwrap_or(u32::MAX);
                if told.take().is_some() {
                    tracing::info!(replica = name, "a replica of identity tells again");
                }
                replica
            }
            Err(error) => {
                let reason = error.to_string();
                if told.replace(reason.clone()).as_ref() != Some(&reason) {
                    tracing::warn!(replica = name, %error, "a replica of identity tells nothing");
                }
                *client = None;
                Replica { name, ..Replica::default() }
            }
        }
    }

    async fn try_ask(
        &self,
        at: SocketAddr,
        client: &mut Option<FleetClient<Channel>>,
        nonce: u64,
        name: &str,
        answers: Duration,
    ) -> Result<Replica, AskError> {
        let client = match client {
            Some(client) => client,
            None => {
                let fresh = FleetClient::new(self.replicas.dial(at).await?);
                client.insert(fresh.max_decoding_message_size(REPORT_BYTES_MAX))
            }
        };
        let token = self.replicas.token().map_err(AskError::Token)?;
        let query = QueryRequest { token: token.clone(), nonce };
        let answer = client.query(query).await.map_err(rpc)?.into_inner();
        // Where a report is long, those who are late are seen with the next query.
        let looks = if answers < LOOK_AGAIN { LOOKS_MAX } else { 0 };
        let mut look = 0;
        tokio::time::sleep(answers).await;
        loop {
            let report = report(client, token.clone()).await?;
            let waiting = report.1.iter().any(|member| member.open && member.answered < nonce);
            look += 1;
            if !answer.taken || !waiting || look > looks {
                let (head, members) = report;
                return Ok(Replica {
                    name: name.to_owned(),
                    reached: answer.taken,
                    started_at: head.started_at.map(UnixTime::from).unwrap_or_default(),
                    newest_nonce: answer.newest_nonce.max(head.newest_nonce),
                    loaded: ids(&head.loaded_issuers),
                    own: head.own.as_ref().map(ack),
                    members,
                });
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

#[async_trait::async_trait]
impl Fleet for Network {
    async fn ask(&self, nonce: u64) -> Vec<Replica> {
        let mut connected = self.connected.lock().await;
        match self.replicas.addresses().await {
            Ok(addresses) => {
                connected.retain(|at, _| addresses.contains(at));
                for at in addresses {
                    connected.entry(at).or_default();
                }
            }
            // Those that are known are asked.
            Err(error) => tracing::warn!(%error, "the replicas of identity cannot be counted"),
        }
        if connected.is_empty() {
            let name = format!("identity {}", self.service);
            return vec![Replica { name, ..Replica::default() }];
        }
        let asking = connected.iter_mut();
        join_all(asking.map(|(at, connected)| self.ask_one(*at, connected, nonce))).await
    }
}

/// One report, whole.
async fn report(
    client: &mut FleetClient<Channel>,
    token: Vec<u8>,
) -> Result<(ReportHead, Vec<Member>), AskError> {
    let mut parts = client.report(ReportRequest { token }).await.map_err(rpc)?.into_inner();
    let (mut head, mut members) = (None, Vec::new());
    while let Some(part) = parts.message().await.map_err(rpc)? {
        match part.part {
            Some(Part::Head(found)) => head = Some(found),
            Some(Part::Members(found)) => members.extend(found.members.iter().filter_map(member)),
            None => {}
        }
    }
    Ok((head.ok_or(AskError::NoHead)?, members))
}

/// A member as a report tells of it; one without an instance is none.
pub fn member(wire: &v1::Member) -> Option<Member> {
    let instance = wire.instance.as_ref()?;
    Some(Member {
        instance: Instance {
            pod_uid: instance.pod_uid.clone(),
            started_at: instance.started_at.map(UnixTime::from).unwrap_or_default(),
        },
        name: wire.name.clone(),
        open: wire.open,
        last_heard: wire.last_heard.map(UnixTime::from).unwrap_or_default(),
        answered: wire.answered,
        answered_before: wire.answered_before,
        used: ids(&wire.used),
        issuers: wire.issuers.iter().filter_map(issuer_use).collect(),
        ack: wire.ack.as_ref().map(ack),
        version: wire.version.parse().ok(),
    })
}

fn issuer_use(wire: &v1::IssuerUse) -> Option<IssuerUse> {
    let failed = (wire.failed > 0).then(|| Failed {
        at: wire.failed_at.map(UnixTime::from).unwrap_or_default(),
        count: wire.failed,
        code: wire.failure.clone(),
    });
    let (inbound, outbound) = (wire.inbound, wire.outbound);
    Some(IssuerUse { issuer: KeyId::from_slice(&wire.issuer_id)?, inbound, outbound, failed })
}

fn ack(wire: &v1::Ack) -> Ack {
    let issuer = KeyId::from_slice(&wire.svid_issuer);
    let svid = issuer.zip(wire.svid_not_after.map(UnixTime::from));
    let offset = wire.clock_offset.as_ref().map_or(0, |offset| {
        offset.seconds.saturating_mul(1000).saturating_add(i64::from(offset.nanos / 1_000_000))
    });
    Ack {
        seq: wire.seq,
        digest: KeyId::from_slice(&wire.digest),
        mounted: KeyId::from_slice(&wire.mounted_digest),
        svid: svid.map(|(issuer, not_after)| HeldSvid { issuer, not_after }),
        clock_offset_ms: offset,
        held: wire.held.as_ref().map(|held| Held {
            anchors: ids(&held.anchors),
            tombstones: ids(&held.tombstones),
            denied: ids(&held.denied_issuers),
        }),
    }
}

fn ids(wire: &[Vec<u8>]) -> Vec<KeyId> {
    wire.iter().filter_map(|id| KeyId::from_slice(id)).collect()
}

fn rpc(status: tonic::Status) -> AskError {
    AskError::Rpc(Box::new(status))
}

const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// An answer takes a round trip; whoever has not answered by then is asked again with the next.
const LOOKS_MAX: u32 = 3;
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// What each member adds to the time that answers take, and what all of them add at most.
const ANSWER: Duration = Duration::from_micros(100);
const ANSWERS_MAX: Duration = Duration::from_millis(500);
/// A batch of 256 members is some 100 KiB.
const REPORT_BYTES_MAX: usize = 4 * 1024 * 1024;
