//! The bundle as a ClusterTrustBundle, where the API server serves them: what pods mount that have
//! a certificate of ours and no sidecar.

use k8s_openapi::api::certificates::v1beta1::{ClusterTrustBundle, ClusterTrustBundleSpec};
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};

use super::store::failed;
use crate::store::StoreError;

/// The one of our signer.
#[derive(Clone)]
pub struct ClusterBundle {
    bundles: Api<ClusterTrustBundle>,
}

impl ClusterBundle {
    /// Of this cluster.
    pub fn new(client: Client) -> Self {
        Self { bundles: Api::all(client) }
    }

    /// Makes it hold these certificates, in PEM. Once this has returned it has been read and does, or
    /// this API server serves none.
    ///
    /// # Errors
    /// The API server's, also when somebody else has written to it meanwhile.
    pub async fn keep(&self, anchors: &str) -> Result<(), StoreError> {
        let written = match self.bundles.get_opt(NAME).await {
            Ok(Some(found)) if found.spec == spec(anchors) => return Ok(()),
            Ok(Some(found)) => {
                let changed = ClusterTrustBundle { spec: spec(anchors), ..found };
                self.bundles.replace(NAME, &PostParams::default(), &changed).await
            }
            Ok(None) => {
                let metadata = ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() };
                let new = ClusterTrustBundle { metadata, spec: spec(anchors) };
                self.bundles.create(&PostParams::default(), &new).await
            }
            Err(error) => Err(error),
        };
        match written {
            Ok(written) if written.spec == spec(anchors) => Ok(()),
            Ok(_) => Err(StoreError::Unavailable(format!("{NAME} was not written as asked"))),
            // It serves no such kind; a kind that it serves can be created.
            Err(kube::Error::Api(status)) if status.code == NOT_FOUND => Ok(()),
            Err(error) => Err(failed(error)),
        }
    }
}

fn spec(anchors: &str) -> ClusterTrustBundleSpec {
    let signer_name = Some(SIGNER_NAME.to_owned());
    ClusterTrustBundleSpec { signer_name, trust_bundle: anchors.to_owned() }
}

/// The signer that pods name in a volume with a certificate of ours, or with the anchors above it.
pub const SIGNER_NAME: &str = "trust.steadfast.dev/svid";
/// The API server wants the signer's name first.
const NAME: &str = "trust.steadfast.dev:svid:bundle";
const NOT_FOUND: u16 = 404;
