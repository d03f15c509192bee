//! One of our operations as one operation of a fusion stream.

use std::fmt;
use std::sync::Arc;

use burn::tensor::Shape;
use burn::tensor::ops::FloatTensor;
use burn_fusion::stream::{Operation, OperationStreams};
use burn_fusion::{Fusion, FusionBackend};
use burn_ir::{CustomOpIr, HandleContainer, OperationIr, TensorIr};

/// Has the backend under the fusion layer compute `run(inputs)` when the stream comes to it: `N` tensors of these shapes, all
/// in the dtype of the first input.
///
/// `name` tells operations apart that differ in more than the shapes of their inputs: fusion plans are kept by it.
pub(super) fn register_all<B: FusionBackend, const N: usize>(
    name: String,
    inputs: Vec<FloatTensor<Fusion<B>>>,
    shapes: [Shape; N],
    run: impl Fn(Vec<FloatTensor<B>>) -> [FloatTensor<B>; N] + Send + Sync + 'static,
) -> [FloatTensor<Fusion<B>>; N] {
    let streams = OperationStreams::with_inputs(&inputs);
    let (client, dtype) = (inputs[0].client.clone(), inputs[0].dtype);
    let outputs = shapes.map(|shape| TensorIr::uninit(client.create_empty_handle(), shape, dtype)).to_vec();
    let inputs = inputs.into_iter().map(|tensor| tensor.into_ir()).collect();
    let ir = CustomOpIr { id: name, inputs, outputs };
    let run: Run<B> = Arc::new(move |inputs| run(inputs).into());
    let operation = Registered::<B> { ir: ir.clone(), run };
    let outputs = client.register(streams, OperationIr::Custom(ir), operation);
    outputs.try_into().unwrap_or_else(|_| unreachable!("as many as were asked for"))
}

/// [`register_all`] of one tensor.
pub(super) fn register<B: FusionBackend>(
    name: String,
    inputs: Vec<FloatTensor<Fusion<B>>>,
    shape: Shape,
    run: impl Fn(Vec<FloatTensor<B>>) -> FloatTensor<B> + Send + Sync + 'static,
) -> FloatTensor<Fusion<B>> {
    let [output] = register_all::<B, 1>(name, inputs, [shape], move |inputs| [run(inputs)]);
    output
}

/// [`register`] with one input.
pub(super) fn one<B: FusionBackend>(
    name: String,
    x: FloatTensor<Fusion<B>>,
    shape: Shape,
    run: impl Fn(FloatTensor<B>) -> FloatTensor<B> + Send + Sync + 'static,
) -> FloatTensor<Fusion<B>> {
    register::<B>(name, vec![x], shape, move |inputs| {
        let [x] = inputs.try_into().expect("one input");
        run(x)
    })
}

/// [`register`] with two inputs.
pub(super) fn two<B: FusionBackend>(
    name: String,
    inputs: [FloatTensor<Fusion<B>>; 2],
    shape: Shape,
    run: impl Fn(FloatTensor<B>, FloatTensor<B>) -> FloatTensor<B> + Send + Sync + 'static,
) -> FloatTensor<Fusion<B>> {
    register::<B>(name, inputs.into(), shape, move |inputs| {
        let [x, y] = inputs.try_into().expect("two inputs");
        run(x, y)
    })
}

type Run<B> = Arc<dyn Fn(Vec<FloatTensor<B>>) -> Vec<FloatTensor<B>> + Send + Sync>;

struct Registered<B: FusionBackend> {
    ir: CustomOpIr,
    run: Run<B>,
}

impl<B: FusionBackend> fmt::Debug for Registered<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registered").field("ir", &self.ir).finish_non_exhaustive()
    }
}

impl<B: FusionBackend> Operation<B::FusionRuntime> for Registered<B> {
    fn execute(&self, handles: &mut HandleContainer<B::Handle>) {
        let inputs = self.ir.inputs.iter().map(|tensor| handles.get_float_tensor::<B>(tensor)).collect();
        for (output, tensor) in self.ir.outputs.iter().zip((self.run)(inputs)) {
            handles.register_float_tensor::<B>(&output.id, tensor);
        }
    }
}
