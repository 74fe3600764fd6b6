//! The gRPC services: Linkerd's `Identity`, our `Trust`, and the controller's `Fleet`. They only
//! translate.

use std::net::SocketAddr;
use std::sync::Arc;

use linkerd2_proxy_api::identity as linkerd;
use linkerd2_proxy_api::identity::identity_server::Identity;
use steadfast_api::trust::v1;
use steadfast_api_grpc::fleet_server::Fleet as FleetApi;
use steadfast_api_grpc::trust_server::Trust;
use tonic::{Request, Response, Status};

use crate::certify::{Certifier, LINKERD, Proof, Request as CertifyRequest};
use crate::fleet::{Fleet, Parts};
use crate::server::{Activity, Peer};

/// All of them. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    /// Issues.
    pub certifier: Arc<Certifier>,
    /// Tells the controller of them.
    pub fleet: Arc<Fleet>,
}

#[tonic::async_trait]
impl Identity for Service {
    /// The comments in Linkerd's proto say PEM; its wire is DER.
    async fn certify(
        &self,
        request: Request<linkerd::CertifyRequest>,
    ) -> Result<Response<linkerd::CertifyResponse>, Status> {
        let peer = peer(&request);
        let message = request.get_ref();
        let request = CertifyRequest {
            api: LINKERD,
            identity: Some(&message.identity),
            proof: Proof::Token(&message.token),
            terms: None,
            csr: &message.certificate_signing_request,
            peer,
        };
        let certified =
            self.certifier.certify(request).await.map_err(|refusal| refusal.status())?;
        Ok(Response::new(linkerd::CertifyResponse {
            leaf_certificate: certified.issued.der.to_vec(),
            intermediate_certificates: certified
                .issued
                .issuers
                .iter()
                .map(|d| d.to_vec())
                .collect(),
            valid_until: Some(certified.issued.not_after.into()),
        }))
    }
}

#[tonic::async_trait]
impl Trust for Service {
    async fn certify(
        &self,
        request: Request<v1::CertifyRequest>,
    ) -> Result<Response<v1::CertifyResponse>, Status> {
        let peer = peer(&request);
        let message = request.get_ref();
        let request = CertifyRequest {
            api: "steadfast",
            identity: None,
            proof: Proof::Token(&message.token),
            terms: None,
            csr: &message.csr,
            peer,
        };
        let certified =
            self.certifier.certify(request).await.map_err(|refusal| refusal.status())?;
        let issued = certified.issued;
        Ok(Response::new(v1::CertifyResponse {
            chain: issued.chain().map(|der| der.to_vec()).collect(),
            issued_at: Some(issued.issued_at.into()),
            not_after: Some(issued.not_after.into()),
            renew_at: Some(certified.renew_at.into()),
            server_time: Some(self.certifier.clock.now().into()),
            seq: certified.seq,
        }))
    }
}

#[tonic::async_trait]
impl FleetApi for Service {
    type ReportStream = Parts;

    async fn query(
        &self,
        request: Request<v1::QueryRequest>,
    ) -> Result<Response<v1::QueryResponse>, Status> {
        let peer = peer(&request);
        let v1::QueryRequest { token, nonce } = request.get_ref();
        let answer = self.fleet.query(token, *nonce, peer).await;
        Ok(Response::new(answer.map_err(|refusal| refusal.status())?))
    }

    async fn report(
        &self,
        request: Request<v1::ReportRequest>,
    ) -> Result<Response<Self::ReportStream>, Status> {
        let peer = peer(&request);
        let activity = request.extensions().get::<Arc<Activity>>().cloned();
        let token = &request.get_ref().token;
        let parts = Arc::clone(&self.fleet).report(token, peer, activity).await;
        Ok(Response::new(parts.map_err(|refusal| refusal.status())?))
    }
}

fn peer<T>(request: &Request<T>) -> Option<SocketAddr> {
    request.extensions().get::<Peer>().map(|peer| peer.0)
}
